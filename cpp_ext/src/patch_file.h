// A compiled patch as a cache file.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "image.h"
#include "patch.h"

namespace edge_lora {

/// Reads what SavePatch wrote. Every offset and size is checked against `slots`.
/// Throws Error(kInvalidArgument) if it is damaged or was made for another image.
std::shared_ptr<Patch> ReadPatch(const std::string& path, const std::vector<Slot>& slots,
                                 const std::string& signature);

}  // namespace edge_lora
