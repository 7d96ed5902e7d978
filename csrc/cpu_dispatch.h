#pragma once

namespace tk {

// The instruction set whose CPU kernels run here.
const char* cpu_isa();

}  // namespace tk
