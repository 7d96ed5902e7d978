// Whether the kernels can run on a GPU at all: found out before the first launch, so that another
// backend can take over.
#pragma once

#include <string>

namespace tk {

// Why no kernel of this build runs on the current device; empty if they do.
std::string cuda_device_problem();

}  // namespace tk
