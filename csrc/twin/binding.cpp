// The module of Python: both passes on tensors that are given by address and shape.
//
// Everything is checked before anything is done: a tensor that is not what the kernels take would
// be read or written beyond its end.
#include "python.h"
#include "run.h"

#include <optional>
#include <sstream>

namespace {

namespace py = pybind11;
using skiparse::Strides;
using twin::Model;
using Shape = std::vector<int64_t>;

// Where only costs are counted, a tensor may have no data: then only that it is there matters.
char nothing;

// A tensor of the caller, who keeps it. `address` is 0 where it has no data.
struct Array {
    uintptr_t address;
    std::string device, dtype;
    Shape shape, strides;

    bool empty() const { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }
    void* data() const {
        if (empty()) return nullptr;
        return address ? reinterpret_cast<void*>(address) : &nothing;
    }
    Strides rows() const { return {strides[0], strides[1], strides[2]}; }

    bool contiguous() const {
        int64_t stride = 1;
        for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) {
            if (shape[i] != 1 && strides[i] != stride) return empty();
        }
        return true;
    }
};

std::string text(const Shape& shape) {
    std::ostringstream out;
    for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "[") << shape[i];
    return out.str() + (shape.empty() ? "[]" : "]");
}

void expect(bool right, const std::string& what) {
    if (!right) throw py::value_error(what);
}

void expect_at_least(int64_t least, const char* name, int64_t value) {
    expect(value >= least, std::string(name) + " must be at least " + std::to_string(least) +
                               ", got " + std::to_string(value));
}

enum class Layout { rows, contiguous };  // rows: any strides, the last is 1

// The tensors of a call, by name.
class Arrays {
public:
    Arrays(std::map<std::string, Array> given, bool costs_only)
        : given_(std::move(given)), costs_only_(costs_only) {}

    bool has(const std::string& name) const { return given_.count(name) > 0; }

    const Array& at(const std::string& name) const {
        const auto found = given_.find(name);
        expect(found != given_.end(), name + " is missing");
        return found->second;
    }

    // That tensor, which is now known to be what the kernels take it for.
    const Array& checked(const std::string& name, const std::string& dtype, const Shape& shape,
                         Layout layout) {
        const Array& x = at(name);
        seen_.push_back(name);
        expect(x.device == "cpu" || (costs_only_ && x.device == "meta"),
               name + " must lie on the CPU, not on " + x.device);
        expect(x.dtype == dtype, name + " must be of " + dtype + ", not of " + x.dtype);
        expect(x.shape == shape,
               name + " must have shape " + text(shape) + ", got " + text(x.shape));
        expect(x.strides.size() == shape.size(), name + " must have a stride for each dimension");
        expect(costs_only_ || x.empty() || x.address != 0, name + " has no data");
        if (layout == Layout::contiguous) {
            expect(x.contiguous(), name + " must be contiguous, got strides " + text(x.strides));
        } else {
            expect(x.empty() || x.strides.back() == 1,
                   name + " must have last stride 1, got strides " + text(x.strides));
        }
        return x;
    }

    void* checked_mask(const std::string& name, const Shape& shape) {
        return has(name) ? checked(name, "bool", shape, Layout::contiguous).data() : nullptr;
    }

    void expect_all_seen() const {
        for (const auto& [name, x] : given_) {
            expect(std::find(seen_.begin(), seen_.end(), name) != seen_.end(),
                   name + " is no tensor of this pass");
        }
    }

private:
    std::map<std::string, Array> given_;
    std::vector<std::string> seen_;
    bool costs_only_;
};

// What both passes are given, checked. `p` gets the pointers of the inputs.
template <class Pointers>
skiparse::Tiling problem(Arrays& arrays, int64_t sparsity, int64_t run, float scale, Pointers& p) {
    const Array &q = arrays.at("q"), &text_q = arrays.at("text_q");
    expect(q.shape.size() == 4, "q must have shape [B, N, H, D], got " + text(q.shape));
    expect(text_q.shape.size() == 4,
           "text_q must have shape [B, T, H, D], got " + text(text_q.shape));
    expect(q.dtype == "float16" || q.dtype == "bfloat16",
           "q must be of float16 or bfloat16, not of " + q.dtype);
    const int64_t B = q.shape[0], N = q.shape[1], H = q.shape[2], D = q.shape[3];
    const int64_t T = text_q.shape[1];
    expect(D == 64 || D == 128,
           "q must have a head dimension of 64 or 128, got " + std::to_string(D));
    expect_at_least(1, "sparsity", sparsity);
    expect_at_least(1, "run", run);

    const auto rows = [&](const char* name, int64_t count) -> const Array& {
        return arrays.checked(name, q.dtype, {B, count, H, D}, Layout::rows);
    };
    rows("q", N);
    const Array &k = rows("k", N), &v = rows("v", N);
    rows("text_q", T);
    const Array &text_k = rows("text_k", T), &text_v = rows("text_v", T);
    p.q = q.data(), p.k = k.data(), p.v = v.data();
    p.text_q = text_q.data(), p.text_k = text_k.data(), p.text_v = text_v.data();
    p.mask = arrays.checked_mask("mask", {B, N});
    p.text_mask = arrays.checked_mask("text_mask", {B, T});
    const bool masked = arrays.has("mask") || arrays.has("text_mask");
    return {B, N, T, H, D, sparsity, run, q.rows(), k.rows(), v.rows(), text_q.rows(),
            text_k.rows(), text_v.rows(), masked, scale};
}

// The outputs of the forward pass.
template <class Pointers>
void outputs(Arrays& arrays, const skiparse::Tiling& t, Pointers& p) {
    const auto whole = [&](const char* name, const std::string& dtype, const Shape& shape) {
        return arrays.checked(name, dtype, shape, Layout::contiguous).data();
    };
    const std::string& dtype = arrays.at("q").dtype;
    p.out = whole("out", dtype, {t.batch, t.tokens, t.heads, t.head_dim});
    p.text_out = whole("text_out", dtype, {t.batch, t.sparsity, t.text, t.heads, t.head_dim});
    p.lse = whole("lse", "float32", {t.batch, t.heads, t.tokens});
    p.text_lse = whole("text_lse", "float32", {t.batch, t.heads, t.sparsity, t.text});
}

const Kernels& variant(int number) {
    const Table found = table();
    expect(0 <= number && number < found.count,
           "variant must be below " + std::to_string(found.count) + ", got " +
               std::to_string(number));
    return found.kernels[number];
}

void check(const Model& model, int cores) {
    expect_at_least(1, "cores", cores);
    expect(0 <= model.guess && model.guess <= 2,
           "guess must be 0, 1 or 2, got " + std::to_string(model.guess));
    expect(-1 <= model.core && model.core < cores,
           "core must be -1, for all, or below " + std::to_string(cores) + ", got " +
               std::to_string(model.core));
}

py::tuple forward(std::map<std::string, Array> given, int64_t sparsity, int64_t run, float scale,
                  int cores, int number, const Model& model) {
    check(model, cores);
    const Kernels& kernels = variant(number);
    Arrays arrays(std::move(given), model.costs_only);
    skiparse::ForwardPointers p{};
    const skiparse::Tiling t = problem(arrays, sparsity, run, scale, p);
    outputs(arrays, t, p);
    arrays.expect_all_seen();
    const bool bf16 = arrays.at("q").dtype == "bfloat16", half_scores = model.half_scores;
    expect(!half_scores || scale > 0,
           "half_scores needs a positive scale, got " + std::to_string(scale));
    expect(kernels.forward(bf16, half_scores) != nullptr,
           "variant " + std::to_string(number) + " has no such forward kernel");

    twin::Machine machine;
    twin::forward(machine, kernels, t, bf16, cores, p, model);
    return twin::costs(machine);
}

// The last of `parts` sub-sequences of one head, each a block as long as q; the tensors are its own,
// and text. There is no memory for the others: pointers are those of whole buffers.
void forward_of_last(std::map<std::string, Array> given, float scale, int64_t parts, int number) {
    expect_at_least(1, "parts", parts);
    const Kernels& kernels = variant(number);
    Arrays arrays(std::move(given), false);
    skiparse::ForwardPointers p{};
    skiparse::Tiling t = problem(arrays, 1, 1, scale, p);
    outputs(arrays, t, p);
    arrays.expect_all_seen();
    expect(t.batch == 1 && t.heads == 1 && t.tokens > 0 && !t.masked,
           "only one head of a batch of one, without masks");
    for (const char* name : {"q", "k", "v"}) {
        expect(arrays.at(name).contiguous(), std::string(name) + " must be contiguous");
    }
    const auto begin = [parts](void*& last, int64_t bytes) {
        if (last) last = static_cast<uint8_t*>(last) - (parts - 1) * bytes;
    };
    const int64_t row = t.head_dim * sizeof(uint16_t), wide = sizeof(float);
    for (void** x : {&p.q, &p.k, &p.v, &p.out}) begin(*x, t.tokens * row);
    begin(p.text_out, t.text * row);
    begin(p.lse, t.tokens * wide);
    begin(p.text_lse, t.text * wide);
    t.sparsity = parts;
    t.run = t.tokens;
    t.tokens *= parts;

    Model model;
    model.core = parts - 1;
    model.last_part = parts;
    twin::Machine machine;
    twin::forward(machine, kernels, t, arrays.at("q").dtype == "bfloat16", parts, p, model);
}

py::tuple backward(std::map<std::string, Array> given, int64_t sparsity, int64_t run, float scale,
                   int cores, int64_t most_in_part, int number, const Model& model) {
    check(model, cores);
    expect_at_least(1, "most_in_part", most_in_part);
    const Kernels& kernels = variant(number);
    Arrays arrays(std::move(given), model.costs_only);
    skiparse::BackwardPointers p{};
    const skiparse::Tiling t = problem(arrays, sparsity, run, scale, p);
    outputs(arrays, t, p);
    const std::string dtype = arrays.at("q").dtype;
    const Shape rows{t.batch, t.tokens, t.heads, t.head_dim};
    const Shape text_rows{t.batch, t.text, t.heads, t.head_dim};
    const Shape parts{t.batch, t.sparsity, t.text, t.heads, t.head_dim};
    const Array& grad_out = arrays.checked("grad_out", dtype, rows, Layout::rows);
    const Array& grad_text_out = arrays.checked("grad_text_out", dtype, parts, Layout::rows);
    p.grad_out = grad_out.data();
    p.grad_text_out = grad_text_out.data();
    const auto gradient = [&](const char* name, const Shape& shape) {
        return arrays.checked(name, dtype, shape, Layout::contiguous).data();
    };
    p.grad_q = gradient("grad_q", rows);
    p.grad_k = gradient("grad_k", rows);
    p.grad_v = gradient("grad_v", rows);
    p.grad_text_q = gradient("grad_text_q", text_rows);
    p.grad_text_k = gradient("grad_text_k", text_rows);
    p.grad_text_v = gradient("grad_text_v", text_rows);
    arrays.expect_all_seen();
    const bool bf16 = dtype == "bfloat16";
    expect((bf16 ? kernels.backward_bf16 : kernels.backward_fp16) != nullptr,
           "variant " + std::to_string(number) + " has no backward kernels");

    const Shape& s = grad_text_out.strides;
    const skiparse::BackwardTiling b{t, grad_out.rows(), {s[0], s[2], s[3]}, s[1], most_in_part};
    twin::Machine machine;
    twin::backward(machine, kernels, b, bf16, cores, p, model);
    return twin::costs(machine);
}

// Bytes a second of the L2 and of the HBM, and bytes of the L2.
std::tuple<double, double, double> device(int guess) {
    const twin::Costs costs{static_cast<twin::Guess>(guess)};
    return {costs.of(twin::figure::L2), costs.of(twin::figure::HBM),
            costs.of(twin::figure::L2_BYTES)};
}

}  // namespace

PYBIND11_MODULE(twin, m) {
    m.doc() = "The kernels on the host twin; csrc.twin.launch calls it";
    twin::raise_faults();
    py::class_<Array>(m, "Array", py::module_local())
        .def(py::init<uintptr_t, std::string, std::string, Shape, Shape>(), py::arg("address"),
             py::arg("device"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
    py::class_<Model>(m, "Model", py::module_local())
        .def(py::init<int32_t, int32_t, int32_t, int32_t, int32_t>(), py::kw_only(),
             py::arg("guess"), py::arg("costs_only"), py::arg("core"), py::arg("last_lane_first"),
             py::arg("half_scores"));
    m.def("forward", forward, py::arg("arrays"), py::kw_only(), py::arg("sparsity"),
          py::arg("run"), py::arg("scale"), py::arg("cores"), py::arg("variant"), py::arg("model"));
    m.def("forward_of_last", forward_of_last, py::arg("arrays"), py::kw_only(), py::arg("scale"),
          py::arg("parts"), py::arg("variant"));
    m.def("backward", backward, py::arg("arrays"), py::kw_only(), py::arg("sparsity"),
          py::arg("run"), py::arg("scale"), py::arg("cores"), py::arg("most_in_part"),
          py::arg("variant"), py::arg("model"));
    m.def("device", device, py::arg("guess"));
}
