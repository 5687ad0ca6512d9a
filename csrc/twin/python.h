// The twin as Python sees it: faults are exceptions, costs are plain objects.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace twin {

namespace py = pybind11;

// From here on a Fault leaves the module as csrc.twin.fault.TwinFault.
inline void raise_faults() {
    py::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            std::rethrow_exception(pointer);
        } catch (const Fault& f) {
            const py::object type = py::module_::import("csrc.twin.fault").attr("TwinFault");
            py::set_error(type, py::make_tuple(f.what(), f.lane, f.file, f.line, f.rule));
        }
    });
}

// ([(launch, core, lane, cycles, {pipe: busy cycles})],
//  {memory: (bytes, read, written, instructions that did)}, [(line, instruction, memory, how many)])
inline py::tuple costs(const Machine& machine) {
    py::list lanes;
    for (const Usage& usage : machine.usage) {
        py::dict busy;
        for (int pipe = 0; pipe < PIPES; ++pipe) busy[PIPE_NAMES[pipe]] = usage.busy[pipe];
        lanes.append(
            py::make_tuple(usage.launch, usage.core, LANE_NAMES[usage.lane], usage.cycles, busy));
    }
    py::dict global;
    for (const Memory& memory : machine.global) {
        global[memory.name.c_str()] =
            py::make_tuple(memory.bytes, memory.bytes_read, memory.bytes_written, memory.copies);
    }
    py::list unaligned;
    for (const auto& [of, times] : machine.unaligned) {
        unaligned.append(py::make_tuple(of.place, of.name, of.memory, times));
    }
    return py::make_tuple(lanes, global, unaligned);
}

}  // namespace twin
