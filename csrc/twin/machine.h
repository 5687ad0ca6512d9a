// One AI core of the twin: what is known to be complete when, and whether every access is allowed.
//
// A core has three sub-cores (one cube, two vector), each with seven pipes that run side by side.
// Operations are executed in program order, but each remembers what was certain to be complete when
// it started: a vector clock, with one component for each pipe. Flags and barriers carry clocks
// from pipe to pipe, cross-core flags from sub-core to sub-core. An operation may touch memory only
// if the earlier accesses it conflicts with are in its clock; so a missing flag is found however
// the pipes happen to be timed, although the numbers come out right.
//
// The clocks carry cycles of the cost model as well. They depend on clocks alone, so not on the
// order in which the sub-cores are executed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cost.h"

namespace twin {

enum Pipe { S, V, M, MTE1, MTE2, MTE3, FIX, PIPES };
constexpr const char* PIPE_NAMES[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};
constexpr const char* LANE_NAMES[] = {"cube", "vector 0", "vector 1"};
constexpr int LANES = 3, COMPONENTS = LANES * PIPES;
constexpr int EVENTS = 6;         // 6 and 7 belong to the framework
constexpr int CROSS_FLAGS = 11;   // 11 to 14 belong to SyncAll
constexpr int ALL_VECTORS = CROSS_FLAGS, ALL = CROSS_FLAGS + 1;  // SyncAll, as what is waited for
constexpr size_t MOST_PENDING = 15;  // a cross-core flag is a counter of 4 bits
constexpr size_t STACK_BYTES = 1 << 20;

// The line of the kernel that called.
struct Where {
    const char* file;
    int line;

    // As a default argument, the place of the call.
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    std::string file_name() const {
        const std::string path = file;
        return path.substr(path.rfind('/') + 1);
    }
    std::string text() const { return file_name() + ":" + std::to_string(line); }
};

// What a kernel did that the hardware forbids, or does not promise to do right.
struct Fault : std::runtime_error {
    explicit Fault(const std::string& rule) : runtime_error(rule), rule(rule) {}
    Fault(Where where, const std::string& rule)
        : runtime_error(where.text() + ": " + rule), file(where.file_name()), line(where.line),
          rule(rule) {}
    Fault(const std::string& lane, const Fault& fault)
        : runtime_error(lane + ": " + fault.what()), lane(lane), file(fault.file),
          line(fault.line), rule(fault.rule) {}

    std::string lane, file;  // the sub-core and where it was, as far as the fault has them
    int line = 0;
    std::string rule;  // that was broken, and by what
};

[[noreturn]] inline void fail(Where where, const std::string& rule) { throw Fault(where, rule); }

inline void require(bool right, Where where, const std::string& what) {
    if (!right) fail(where, what);
}

// How many operations of every pipe are known to be complete, and the cycle from which on.
struct Clock {
    std::array<uint32_t, COMPONENTS> seen{};
    double cycle = 0;

    void join(const Clock& other, double later = 0) {
        for (int i = 0; i < COMPONENTS; ++i) seen[i] = std::max(seen[i], other.seen[i]);
        cycle = std::max(cycle, other.cycle + later);
    }
};

// An operation that was issued, kept so that a later conflict can name it.
struct Issued {
    Where where;
    const char* name;
    int core;
    int component;
    uint32_t time;
};

// A memory, and beside it who touched each of its cells last. Operation 0 is "nobody".
class Memory {
public:
    Memory(std::string name, uint8_t* data, size_t bytes, size_t cell, bool filled, bool writable)
        : name(std::move(name)), data(data), bytes(bytes), writable(writable), cell_(cell),
          filled_(bytes, filled), cells_(writable ? (bytes + cell - 1) / cell : 0) {}

    // Addresses alone, for a launch of which only the costs are counted.
    Memory(std::string name, uint8_t* data, size_t bytes)
        : name(std::move(name)), data(data), bytes(bytes), writable(true), cell_(1) {}

    std::string name;
    uint8_t* data;
    size_t bytes;
    bool writable;
    bool scratch = false;  // of the kernels themselves, so where buffers lie is their choice
    uint64_t bytes_read = 0, bytes_written = 0, copies = 0;  // by the DMA

    bool filled(size_t first, size_t size) const {
        return !std::memchr(filled_.data() + first, 0, size);
    }

private:
    struct Cell {
        uint32_t write = 0;
        uint32_t read[2] = {0, 0};  // the last of each of two pipes that read since
    };
    friend class Operation;
    size_t cell_;
    std::map<size_t, std::vector<uint32_t>> more_readers_;  // of a cell, beyond two
    std::vector<uint8_t> filled_;  // of every byte, whether anything was written there
    std::vector<Cell> cells_;
};

// On-chip memories are cells of 32 bytes, their unit of access; global memory is cells of 4, the
// least that two pipes of a kernel write side by side.
constexpr size_t CHIP_CELL = 32, GLOBAL_CELL = 4;

// An on-chip memory, from which one allocator cuts buffers.
struct Chip {
    Chip(const char* name, size_t bytes)
        : storage(bytes, 0xcd), memory(name, storage.data(), bytes, CHIP_CELL, false, true) {}

    std::vector<uint8_t> storage;
    Memory memory;
    bool cut = false;
};

struct Flag {
    bool set = false;
    Clock clock;
    Where where{"", 0};
};

struct CrossFlag {
    Clock clock;
    int pipe;
    Where where;
};

// With unitFlag, each 512 bytes of L0C are a flag between the cube and Fixpipe, both ways: set
// while they hold a product that is not taken yet.
constexpr size_t UNIT_BYTES = 512, UNITS = 128 * 1024 / UNIT_BYTES;

struct SubCore {
    explicit SubCore(int lane) : lane(lane) {
        if (lane == 0) {
            chips[0] = std::make_unique<Chip>("L1", 512 * 1024 - 256);
            chips[1] = std::make_unique<Chip>("L0A", 64 * 1024);
            chips[2] = std::make_unique<Chip>("L0B", 64 * 1024);
            chips[3] = std::make_unique<Chip>("L0C", 128 * 1024);
        } else {
            chips[4] = std::make_unique<Chip>("UB", 192 * 1024 - 256 - 8 * 1024);
        }
    }

    int lane;
    Clock base[PIPES];         // complete before the next operation of the pipe starts
    Clock done[PIPES];         // complete once all operations of the pipe are
    uint32_t issued[PIPES]{};
    double free[PIPES]{};      // the cycle from which on the pipe takes another operation
    double busy[PIPES]{};      // cycles
    std::array<double, figure::QUEUE> started[PIPES]{};  // the cycles of the last operations
    Flag flags[PIPES][PIPES][EVENTS];
    std::deque<CrossFlag> arrived[LANES][CROSS_FLAGS];  // from each lane
    std::unique_ptr<Chip> chips[5];
    std::vector<Flag> units = std::vector<Flag>(lane == 0 ? UNITS : 0);
    bool by_rows = false;  // the order in which products are finished
    uint32_t synced[2]{};  // operations before these, of cubes and of vector cores, are complete

    // What is complete when a flag is set on a pipe: its operations, and what it waited for.
    Clock complete_at_flag(int pipe) const {
        Clock clock = done[pipe];
        clock.join(base[pipe]);
        clock.join(base[S]);
        return clock;
    }

    // The scalar unit goes on to the next instruction, or to a flag or barrier.
    void issue(const Costs& costs) { base[S].cycle += costs.of(figure::ISSUE); }

    // Anything but a barrier: it stands after InitSocState(), and before the last barrier.
    void begin(Where where) {
        require(initialised, where, "before InitSocState(): what the kernel before left is in force");
        last = where;
        drained = false;
    }

    // An operation takes its pipe.
    void take(int pipe, const Cost& cost, const Costs& costs) {
        issue(costs);
        double& oldest = started[pipe][issued[pipe]++ % figure::QUEUE];
        base[S].cycle = std::max(base[S].cycle, oldest);  // for its place in the queue
        const double start = std::max({base[S].cycle, base[pipe].cycle, free[pipe]});
        oldest = start;
        free[pipe] = start + cost.busy;
        if (pipe == S) base[S].cycle = free[S];
        busy[pipe] += cost.busy;
        done[pipe].cycle = std::max(done[pipe].cycle, free[pipe] + cost.latency);
    }

    double end() const {
        double cycle = base[S].cycle;
        for (const Clock& clock : done) cycle = std::max(cycle, clock.cycle);
        return cycle;
    }

    bool initialised = false;  // by InitSocState()
    bool drained = false;      // by PipeBarrier<PIPE_ALL>, with nothing after it
    Where last{"the kernel", 0};
    bool adds = false;  // whether copies to global memory add to what is there
    Where adds_since{"", 0};
    bool finished = false;
    int waits_for = -1;  // a cross-core flag, ALL_VECTORS or ALL
    Where waits_at{"", 0};
    ucontext_t context{};
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
};

// An instruction whose place in global memory is no multiple of this many bytes is slower.
constexpr size_t FAST_ALIGNMENT = 512;

// Such instructions, of one line of a kernel: where and in which memory.
struct Unaligned {
    std::string place, name, memory;
    auto key() const { return std::tie(place, name, memory); }
    bool operator<(const Unaligned& other) const { return key() < other.key(); }
};

// What a launch took of each sub-core that ran.
struct Usage {
    int launch, core, lane;
    double busy[PIPES], cycles;
};

using Lanes = std::array<std::unique_ptr<SubCore>, LANES>;

// The device: global memory, and the core that is running. Cores run one after another, each to its
// end or a SyncAll. Since nothing else orders them within a launch, a conflict between two of them
// is a fault.
struct Machine {
    Costs costs;
    bool costs_only = false;    // neither data nor checks of it; global memory is addresses alone
    int only_core = -1;         // or all
    bool last_lane_first = false;  // the order in which sub-cores run, which must not matter
    int launches = 0;
    std::vector<Usage> usage;
    std::vector<Memory> global;
    std::map<Unaligned, uint64_t> unaligned;  // how many of each there were
    std::vector<Issued> log{1};
    uint32_t launch_begins = 1;  // the operations before it belong to launches that have ended
    Lanes lanes;
    SubCore* self = nullptr;
    int core = 0, cores = 0;
    bool mixed = true;  // cube and vector sub-cores work together; else vector 0 alone
    std::function<void()> kernel;
    std::optional<Fault> fault;
    ucontext_t scheduler{};

    Memory& find(const void* address, size_t size, Where where) {
        const auto* first = static_cast<const uint8_t*>(address);
        const Memory* short_one = nullptr;  // tensors may lie in one another, as slices of one
        for (Memory& memory : global) {
            if (first < memory.data || first >= memory.data + memory.bytes) continue;
            if (first + size <= memory.data + memory.bytes) return memory;
            short_one = &memory;
        }
        if (short_one != nullptr) fail(where, "runs past the end of " + short_one->name);
        fail(where, "outside every allocation of global memory");
    }

    // A DMA instruction that reads or writes so many bytes of global memory, from `address` on and
    // not beyond `extent` bytes. Writes, and all in scratch memory, are counted if not aligned.
    void count_moved(const char* name, const void* address, size_t extent, uint64_t read,
                     uint64_t written, Where where) {
        if (read + written == 0) return;
        Memory& memory = find(address, extent, where);
        memory.bytes_read += read;
        memory.bytes_written += written;
        ++memory.copies;
        const size_t first = static_cast<const uint8_t*>(address) - memory.data;
        if ((written > 0 || memory.scratch) && first % FAST_ALIGNMENT != 0) {
            ++unaligned[{where.text(), name, memory.name}];
        }
    }
};

inline Machine* machine = nullptr;

inline bool cube() { return machine->self->lane == 0; }

// One instruction, from its start. Its reads and writes are checked against what is complete.
class Operation {
public:
    Operation(int pipe, const char* name, const Cost& cost, Where where)
        : where_(where), in_order_(pipe == S) {
        SubCore& self = *machine->self;
        self.begin(where);
        self.take(pipe, cost, machine->costs);
        if (machine->costs_only) return;
        start_ = self.base[pipe];
        start_.join(self.base[S]);  // the scalar unit issues, so what it waited for is complete
        component_ = self.lane * PIPES + pipe;
        const uint32_t time = self.issued[pipe];
        self.done[pipe].join(start_);
        self.done[pipe].seen[component_] = time;
        id_ = static_cast<uint32_t>(machine->log.size());
        machine->log.push_back({where, name, machine->core, component_, time});
    }

    // Whether data is to be moved, and computed with.
    bool executes() const { return !machine->costs_only; }

    // The cube adds to its accumulator in order where it is busy long enough to have written it.
    void follow_own_pipe() { in_order_ = true; }

    void read(Memory& memory, size_t first, size_t size) {
        if (size == 0) return;
        require(memory.filled(first, size), where_,
                label() + " reads " + memory.name + " where nothing was written");
        if (!memory.writable) return;
        const size_t end = (first + size - 1) / memory.cell_;
        for (size_t i = first / memory.cell_; i <= end; ++i) {
            Memory::Cell& cell = memory.cells_[i];
            expect_complete(cell.write, memory, "reads", "written");
            remember_read(cell, i, memory);
        }
    }

    void write(Memory& memory, size_t first, size_t size) {
        if (size == 0) return;
        require(memory.writable, where_, label() + " writes " + memory.name + ", an input");
        const size_t end = (first + size - 1) / memory.cell_;
        for (size_t i = first / memory.cell_; i <= end; ++i) {
            Memory::Cell& cell = memory.cells_[i];
            for (uint32_t& reader : cell.read) {
                expect_complete(reader, memory, "overwrites", "read");
                reader = 0;
            }
            if (!memory.more_readers_.empty()) {
                for (uint32_t reader : memory.more_readers_[i]) {
                    expect_complete(reader, memory, "overwrites", "read");
                }
                memory.more_readers_.erase(i);
            }
            expect_complete(cell.write, memory, "overwrites", "written");
            cell.write = id_;
        }
        std::memset(memory.filled_.data() + first, 1, size);
    }

    // Writes something, and nobody says what.
    void spoil(Memory& memory, size_t first, size_t size) {
        write(memory, first, size);
        std::memset(memory.filled_.data() + first, 0, size);
        std::memset(memory.data + first, 0xcd, size);
    }

    void read_global(const void* address, size_t size) {
        Memory& memory = machine->find(address, size, where_);
        const size_t first = static_cast<const uint8_t*>(address) - memory.data;
        if (component_ % PIPES == S) expect_no_dma_wrote(memory, first, size);
        read(memory, first, size);
    }

    void write_global(const void* address, size_t size) {
        Memory& memory = machine->find(address, size, where_);
        write(memory, static_cast<const uint8_t*>(address) - memory.data, size);
    }

private:
    bool complete(uint32_t id) {
        if (id == known_ || id == id_ || id < machine->launch_begins) return true;
        const Issued& other = machine->log[id];
        const bool ordered = id < machine->self->synced[other.component / PIPES > 0] ||
                             (other.core == machine->core &&
                              (start_.seen[other.component] >= other.time ||
                               (in_order_ && other.component == component_)));
        if (ordered) known_ = id;
        return ordered;
    }

    void expect_complete(uint32_t id, const Memory& memory, const char* does, const char* was) {
        if (complete(id)) return;
        const Issued& other = machine->log[id];
        fail(where_, label() + " " + does + " " + memory.name + ", " + was + " by " + other.name +
                         " at " + other.where.text() + ", and nothing orders the two");
    }

    // The scalar unit reads through a cache that no DMA updates.
    void expect_no_dma_wrote(Memory& memory, size_t first, size_t size) {
        if (!memory.writable) return;
        const size_t end = (first + size - 1) / memory.cell_;
        for (size_t i = first / memory.cell_; i <= end; ++i) {
            const uint32_t id = memory.cells_[i].write;
            if (id < machine->launch_begins || machine->log[id].component % PIPES == S) continue;
            fail(where_, label() + " reads " + memory.name + " through the cache of the scalar " +
                             "unit, which does not see what " + machine->log[id].name + " at " +
                             machine->log[id].where.text() + " wrote in this launch");
        }
    }

    void remember_read(Memory::Cell& cell, size_t i, Memory& memory) {
        for (uint32_t& reader : cell.read) {
            if (complete(reader) || same_pipe(machine->log[reader])) {
                reader = id_;
                return;
            }
        }
        memory.more_readers_[i].push_back(id_);
    }

    bool same_pipe(const Issued& other) const {
        return other.core == machine->core && other.component == component_;
    }

    std::string label() const { return machine->log[id_].name; }

    Where where_;
    Clock start_;
    int component_ = 0;
    uint32_t id_ = 0, known_ = 0;
    bool in_order_;  // the scalar unit finishes one operation before the next
};

// Synchronisation.

inline void barrier(int pipe) {
    SubCore& self = *machine->self;
    self.issue(machine->costs);
    self.base[pipe].join(self.done[pipe]);
}

inline void barrier_all() {
    SubCore& self = *machine->self;
    self.issue(machine->costs);
    Clock all;
    for (const Clock& clock : self.done) all.join(clock);
    for (Clock& clock : self.base) clock.join(all);
    self.drained = true;
}

inline std::string flag_name(int from, int to, int id) {
    return std::string(PIPE_NAMES[from]) + "_" + PIPE_NAMES[to] + " flag " + std::to_string(id);
}

inline Flag& flag(int from, int to, int id, Where where) {
    require(id >= 0 && id < EVENTS, where,
            flag_name(from, to, id) + ": a kernel has 0 to " + std::to_string(EVENTS - 1));
    return machine->self->flags[from][to][id];
}

inline void set_flag(int from, int to, int id, Where where) {
    Flag& f = flag(from, to, id, where);
    require(!f.set, where,
            flag_name(from, to, id) + " is set again; nothing waited since " + f.where.text());
    machine->self->begin(where);
    machine->self->issue(machine->costs);
    f = {true, machine->self->complete_at_flag(from), where};
}

inline void wait_flag(int from, int to, int id, Where where) {
    Flag& f = flag(from, to, id, where);
    require(f.set, where, flag_name(from, to, id) + " is waited for, and nothing has set it");
    f.set = false;
    machine->self->begin(where);
    machine->self->issue(machine->costs);
    machine->self->base[to].join(f.clock, machine->costs.of(figure::FLAG));
}

// The units of `size` bytes of L0C from `first` on are free to be multiplied into.
inline void wait_for_free_units(size_t first, size_t size, Where where) {
    SubCore& self = *machine->self;
    for (size_t i = first / UNIT_BYTES; i <= (first + size - 1) / UNIT_BYTES; ++i) {
        require(!self.units[i].set, where,
                "waits until a Fixpipe with unitFlag takes the product of " +
                    self.units[i].where.text());
        self.base[M].join(self.units[i].clock);
    }
}

// They hold a product, to be taken.
inline void wait_for_ready_units(size_t first, size_t size, Where where) {
    SubCore& self = *machine->self;
    for (size_t i = first / UNIT_BYTES; i <= (first + size - 1) / UNIT_BYTES; ++i) {
        require(self.units[i].set, where, "waits for a product with unitFlag 3, and there is none");
        self.base[FIX].join(self.units[i].clock);
    }
}

// The product of the cube is ready, or Fixpipe has taken it.
inline void set_units(int pipe, size_t first, size_t size, Where where) {
    SubCore& self = *machine->self;
    for (size_t i = first / UNIT_BYTES; i <= (first + size - 1) / UNIT_BYTES; ++i) {
        self.units[i] = {pipe == M, self.complete_at_flag(pipe), where};
    }
}

inline void set_cross_flag(int id, int pipe, Where where) {
    require(id >= 0 && id < CROSS_FLAGS, where,
            "cross-core flag " + std::to_string(id) + ": a kernel has 0 to 10");
    require(machine->mixed, where, "cross-core flag in a kernel of vector cores alone");
    SubCore& self = *machine->self;
    self.begin(where);
    self.issue(machine->costs);
    const int first = cube() ? 1 : 0, last = cube() ? 2 : 0;
    for (int lane = first; lane <= last; ++lane) {
        auto& arrived = machine->lanes[lane]->arrived[self.lane][id];
        require(arrived.empty() || arrived.back().pipe == pipe, where,
                "cross-core flag " + std::to_string(id) + " is set by two pipes, in no order");
        arrived.push_back({self.complete_at_flag(pipe), pipe, where});
        require(arrived.size() <= MOST_PENDING, where,
                "cross-core flag " + std::to_string(id) + " is set more than 15 times ahead");
    }
}

inline bool cross_flag_arrived(const SubCore& lane, int id) {
    if (id >= CROSS_FLAGS) return false;  // SyncAll
    if (lane.lane != 0) return !lane.arrived[0][id].empty();
    return !lane.arrived[1][id].empty() && !lane.arrived[2][id].empty();
}

inline void wait_cross_flag(int id, Where where) {
    require(id >= 0 && id < CROSS_FLAGS, where,
            "cross-core flag " + std::to_string(id) + ": a kernel has 0 to 10");
    SubCore& self = *machine->self;
    self.begin(where);
    self.issue(machine->costs);
    self.waits_for = id;
    self.waits_at = where;
    while (!cross_flag_arrived(self, id)) swapcontext(&self.context, &machine->scheduler);
    self.waits_for = -1;
    for (auto& from : self.arrived) {
        if (from[id].empty()) continue;
        for (Clock& clock : self.base) {  // all pipes stop
            clock.join(from[id].front().clock, machine->costs.of(figure::CROSS_FLAG));
        }
        from[id].pop_front();
    }
}

// Waits until all vector cores of the launch, or all cores, have come here with nothing left to do.
inline void sync_all(bool vectors_only, Where where) {
    require(!vectors_only || !cube(), where, "SyncAll of the vector cores, on a cube core");
    SubCore& self = *machine->self;
    barrier_all();
    self.begin(where);
    self.waits_for = vectors_only ? ALL_VECTORS : ALL;
    self.waits_at = where;
    while (self.waits_for >= 0) swapcontext(&self.context, &machine->scheduler);
}

// Running.

inline void expect_clean_end(SubCore& lane) {
    for (const Flag& unit : lane.units) {
        require(!unit.set, unit.where, "the product with unitFlag 3 is never taken");
    }
    for (int from = 0; from < PIPES; ++from) {
        for (int to = 0; to < PIPES; ++to) {
            for (int id = 0; id < EVENTS; ++id) {
                const Flag& f = lane.flags[from][to][id];
                require(!f.set, f.where, flag_name(from, to, id) + " is left set at the end");
            }
        }
    }
}

inline void run_lane() {
    SubCore& self = *machine->self;
    try {
        machine->kernel();
        expect_clean_end(self);
        require(!self.adds, self.adds_since, "SetAtomicAdd is still in force at the end");
        require(self.drained, self.last,
                "is the last of this core, and a PipeBarrier<PIPE_ALL> must be");
    } catch (const Fault& fault) {
        machine->fault.emplace(LANE_NAMES[self.lane], fault);
    }
    self.finished = true;
    swapcontext(&self.context, &machine->scheduler);
}

inline void start_core(int lanes_from, int lanes_to) {
    Lanes& lanes = machine->lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = std::make_unique<SubCore>(i);
    for (int i = lanes_from; i <= lanes_to; ++i) {
        SubCore& lane = *lanes[i];
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, run_lane, 0);
    }
}

// Runs the core until all of its sub-cores have ended or wait. Whether they have ended.
inline bool run_core(int lanes_from, int lanes_to) {
    Machine& m = *machine;
    for (bool moved = true, left = true; left;) {
        moved = left = false;
        for (int place = lanes_from; place <= lanes_to; ++place) {
            const int i = m.last_lane_first ? lanes_from + lanes_to - place : place;
            SubCore& lane = *m.lanes[i];
            if (lane.finished) continue;
            left = true;
            if (lane.waits_for >= 0 && !cross_flag_arrived(lane, lane.waits_for)) continue;
            moved = true;
            m.self = &lane;
            swapcontext(&m.scheduler, &lane.context);
            if (m.fault) throw *m.fault;
        }
        if (left && !moved) return false;
    }
    for (int i = lanes_from; i <= lanes_to; ++i) {
        const SubCore& lane = *m.lanes[i];
        m.usage.push_back({m.launches, m.core, i, {}, lane.end()});
        std::copy_n(lane.busy, PIPES, m.usage.back().busy);
    }
    for (const auto& lane : m.lanes) {
        for (auto& from : lane->arrived) {
            for (int id = 0; id < CROSS_FLAGS; ++id) {
                if (from[id].empty()) continue;
                fail(from[id].front().where,
                     "cross-core flag " + std::to_string(id) + " is left set at the end");
            }
        }
    }
    return true;
}

inline std::string waiting(const Lanes& lanes) {
    std::string report;
    for (const auto& lane : lanes) {
        if (lane->waits_for < 0) continue;
        report += std::string(report.empty() ? "" : "; ") + lane->waits_at.text() + ": " +
                  LANE_NAMES[lane->lane] + " waits for " +
                  (lane->waits_for < CROSS_FLAGS
                       ? "cross-core flag " + std::to_string(lane->waits_for)
                       : "SyncAll");
    }
    return report;
}

// Lets the cores go on that are all at a SyncAll; there is one in `parked` for each of the launch.
inline void finish_sync(std::vector<Lanes>& parked, int lanes_from, int lanes_to) {
    int kind = 0;
    for (const Lanes& lanes : parked) {
        for (int i = lanes_from; lanes[0] && i <= lanes_to; ++i) {
            kind = std::max(kind, lanes[i]->waits_for);
        }
    }
    const int first = kind == ALL ? lanes_from : std::max(1, lanes_from);
    for (const Lanes& lanes : parked) {
        for (int i = first; i <= lanes_to; ++i) {
            const bool there = kind >= CROSS_FLAGS && lanes[0] && lanes[i]->waits_for == kind;
            if (there) continue;
            for (const Lanes& stuck : parked) {
                if (stuck[0]) throw Fault(waiting(stuck) + ": deadlock");
            }
        }
    }
    double latest = 0;
    for (const Lanes& lanes : parked) {
        for (int i = first; i <= lanes_to; ++i) latest = std::max(latest, lanes[i]->end());
    }
    latest += machine->costs.of(figure::CROSS_FLAG);
    for (Lanes& lanes : parked) {
        for (int i = first; i <= lanes_to; ++i) {
            SubCore& lane = *lanes[i];
            lane.waits_for = -1;
            for (Clock& clock : lane.base) clock.cycle = std::max(clock.cycle, latest);
            lane.synced[1] = static_cast<uint32_t>(machine->log.size());
            if (kind == ALL) lane.synced[0] = lane.synced[1];
        }
    }
}

// Runs a kernel on `cores` cores: of a cube and two vector sub-cores, or of one vector sub-core.
inline void launch(Machine& m, int cores, bool mixed, std::function<void()> kernel) {
    machine = &m;
    m.kernel = std::move(kernel);
    m.cores = cores;
    m.mixed = mixed;
    m.launch_begins = static_cast<uint32_t>(m.log.size());
    const int lanes_from = mixed ? 0 : 1, lanes_to = mixed ? 2 : 1;
    const int first = m.only_core < 0 ? 0 : m.only_core;
    std::vector<Lanes> parked(m.only_core < 0 ? cores : 1);  // the cores that wait for others
    for (bool starts = true, left = true; left; starts = false) {
        left = false;
        for (m.core = first; m.core < first + static_cast<int>(parked.size()); ++m.core) {
            Lanes& lanes = parked[m.core - first];
            if (!starts && !lanes[0]) continue;
            std::swap(m.lanes, lanes);
            if (starts) start_core(lanes_from, lanes_to);
            const bool ended = run_core(lanes_from, lanes_to);
            std::swap(m.lanes, lanes);
            if (ended) lanes = {};
            left = left || !ended;
        }
        if (left) finish_sync(parked, lanes_from, lanes_to);
    }
    ++m.launches;
}

}  // namespace twin
