// What the launches of a machine cost, as JSON.
#pragma once

#include <sstream>

#include "machine.h"

namespace twin {

// {"lanes": [{"launch", "core", "lane", "cycles", "busy": {pipe: cycles}}],
//  "global": {memory: [its bytes, bytes read, bytes written, instructions that did]},
//  "unaligned": [[line, instruction, memory, how many]]}
inline std::string report(const Machine& machine) {
    std::ostringstream text;
    text.precision(17);
    text << "{\"lanes\": [";
    const char* comma = "";
    for (const Usage& usage : machine.usage) {
        text << comma << "{\"launch\": " << usage.launch << ", \"core\": " << usage.core
             << ", \"lane\": \"" << LANE_NAMES[usage.lane] << "\", \"cycles\": " << usage.cycles
             << ", \"busy\": {";
        for (int pipe = 0; pipe < PIPES; ++pipe) {
            text << (pipe ? ", \"" : "\"") << PIPE_NAMES[pipe] << "\": " << usage.busy[pipe];
        }
        text << "}}";
        comma = ", ";
    }
    text << "], \"global\": {";
    comma = "";
    for (const Memory& memory : machine.global) {
        text << comma << '"' << memory.name << "\": [" << memory.bytes << ", " << memory.bytes_read
             << ", " << memory.bytes_written << ", " << memory.copies << "]";
        comma = ", ";
    }
    text << "}, \"unaligned\": [";
    comma = "";
    for (const auto& [of, times] : machine.unaligned) {
        text << comma << "[\"" << of.place << "\", \"" << of.name << "\", \"" << of.memory
             << "\", " << times << "]";
        comma = ", ";
    }
    text << "]}";
    return text.str();
}

}  // namespace twin
