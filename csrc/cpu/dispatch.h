// Which instruction set's CPU kernels run: the best that the processor has, unless told otherwise.
#pragma once

#include <string>
#include <vector>

namespace tk {

// What this processor can run, best first.
std::vector<std::string> cpu_isas();

std::string cpu_isa();

// Makes another of cpu_isas() run, so that each can be tested. Throws std::invalid_argument.
void set_cpu_isa(const std::string& name);

}  // namespace tk
