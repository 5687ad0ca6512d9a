// Queues of buffers, handed from one pipe to another and back: the flags are the queue's.
#pragma once

#include <deque>

#include "tensor.h"

namespace twin {

// The pipe that fills the buffers of a queue, and the one that uses them.
struct QueueEnds {
    int from, to;
};

constexpr QueueEnds queue_ends(TPosition position) {
    switch (position) {
        case TPosition::A1:
        case TPosition::B1: return {MTE2, MTE1};
        case TPosition::A2:
        case TPosition::B2: return {MTE1, M};
        case TPosition::CO1: return {M, FIX};
        case TPosition::VECIN: return {MTE2, V};
        case TPosition::VECOUT: return {V, MTE3};
        default: return {V, V};
    }
}

}  // namespace twin

namespace AscendC {

// A buffer is allocated, filled, put in the queue, taken from it, used, and freed. At most DEPTH
// are in the queue at a time.
template <TPosition POSITION, int32_t DEPTH>
class TQue {
    enum State { FREE, ALLOCATED, QUEUED, TAKEN };
    static constexpr twin::QueueEnds ENDS = twin::queue_ends(POSITION);

public:
    TQue() = default;
    TQue(const TQue&) = delete;
    TQue& operator=(const TQue&) = delete;
    ~TQue() noexcept(false) {
        if (std::uncaught_exceptions()) return;
        for (const Buffer& buffer : buffers_) {
            twin::require(buffer.state == FREE, buffer.where,
                          buffer.state == QUEUED ? "is left in the queue at the end"
                                                 : "is not freed at the end");
        }
    }

    template <class T>
    LocalTensor<T> AllocTensor(Where where = Where::here()) {
        for (Buffer& buffer : buffers_) {
            if (buffer.state != FREE) continue;
            twin::machine->self->base[ENDS.from].join(buffer.clock);
            buffer.state = ALLOCATED;
            buffer.where = where;
            return buffer.whole.template ReinterpretCast<T>();
        }
        twin::fail(where, "none of the " + std::to_string(buffers_.size()) +
                              " buffers of the queue was freed");
    }

    template <class T>
    bool EnQue(const LocalTensor<T>& tensor, Where where = Where::here()) {
        Buffer& buffer = find(tensor, where);
        twin::require(buffer.state == ALLOCATED, where,
                      "puts in the queue what was not allocated, or is there already");
        twin::require(order_.size() < DEPTH, where,
                      "more than " + std::to_string(DEPTH) + " buffers in the queue");
        buffer = {buffer.whole, QUEUED, twin::machine->self->complete_at_flag(ENDS.from), where};
        order_.push_back(&buffer);
        return true;
    }

    template <class T>
    LocalTensor<T> DeQue(Where where = Where::here()) {
        twin::require(!order_.empty(), where, "takes from an empty queue");
        Buffer& buffer = *order_.front();
        order_.pop_front();
        twin::machine->self->base[ENDS.to].join(buffer.clock);
        buffer.state = TAKEN;
        buffer.where = where;
        return buffer.whole.template ReinterpretCast<T>();
    }

    template <class T>
    void FreeTensor(LocalTensor<T>& tensor, Where where = Where::here()) {
        Buffer& buffer = find(tensor, where);
        twin::require(buffer.state == ALLOCATED || buffer.state == TAKEN, where,
                      "frees what is in the queue, or free already");
        buffer = {buffer.whole, FREE, twin::machine->self->complete_at_flag(ENDS.to), where};
    }

private:
    friend class TPipe;
    struct Buffer {
        LocalTensor<uint8_t> whole;
        State state = FREE;
        twin::Clock clock{};  // what is complete when its flag arrives
        Where where{"", 0};   // of the last call
    };

    template <class T>
    Buffer& find(const LocalTensor<T>& tensor, Where where) {
        for (Buffer& buffer : buffers_) {
            if (buffer.whole.chip == tensor.chip && buffer.whole.at == tensor.at) return buffer;
        }
        twin::fail(where, "a tensor that is no buffer of this queue");
    }

    std::deque<Buffer> buffers_;
    std::deque<Buffer*> order_;
};

}  // namespace AscendC
