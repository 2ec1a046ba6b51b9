/// The C ABI of the edge_lora core (in construction below the first line).
#pragma once
#include <stdint.h>
#define EL_ABI_VERSION 1
#define EL_API __attribute__((visibility("default")))
#ifdef __cplusplus
extern "C" {
#endif
EL_API int32_t el_abi_version(void);
#ifdef __cplusplus
}
#endif
