#include "edge_lora/edge_lora.h"

extern "C" int32_t el_abi_version(void) { return EL_ABI_VERSION; }
