/// The C ABI of the edge_lora core: swap adapters in a live engine by patching its packed weights.
///
/// Conventions
///   * Every function that can fail returns el_status; el_last_error() then has the message, for
///   this
///     thread, until its next failing call. No C++ exception leaves the library.
///   * Handles are opaque. Who opens, makes or compiles one closes or frees it; null is ignored
///   there.
///     A handle may be freed while another still uses what is behind it.
///   * Strings are UTF-8, ended by a zero. Strings and arrays that are passed in are copied.
///   Returned
///     strings live as long as their handle; out-arrays belong to the caller.
///   * Functions on different handles may run at once. An adapter and a layout are immutable and
///   may
///     be shared; calls on one image take turns by themselves. While an image is swapped or poked
///     no engine may read its weights: that lock is the caller's.
///   * A weight is (out, in) as torch.nn.Linear stores it; values are fp32.
#pragma once

#include <stddef.h>
#include <stdint.h>

/// Grows when a function changes or goes; new functions alone do not count.
#define EL_ABI_VERSION 1
#define EL_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum el_status {
  EL_OK = 0,
  EL_ADAPTER_FILE = 1,      ///< An adapter file is damaged, malicious or of an unknown version.
  EL_ADAPTER_MISMATCH = 2,  ///< A sound adapter does not fit the image.
  EL_UNSUPPORTED = 3,       ///< Well formed, but this engine or form cannot do it.
  EL_BUNDLE = 4,            ///< A weight file is missing, cut or changed.
  EL_INVALID_ARGUMENT = 5,
  EL_INPUT_OUTPUT = 6,
  EL_OUT_OF_MEMORY = 7,
  EL_INTERNAL = 8,  ///< A bug of ours.
} el_status;

typedef enum el_stored {
  EL_STORED_OI = 0,  ///< (out, in), row-major
  EL_STORED_IO = 1,  ///< (in, out), row-major
} el_stored;

typedef struct el_adapter el_adapter;
typedef struct el_layout el_layout;
typedef struct el_image el_image;
typedef struct el_patch el_patch;

typedef struct el_swap_stats {
  double ms;
  uint64_t bytes;  ///< Of weights written.
} el_swap_stats;

typedef struct el_block {
  uintptr_t address;
  uint64_t bytes;
  int32_t reserved;  ///< Lives as long as a session: an initializer or a packed weight.
} el_block;

typedef struct el_allocator_stats {
  uint64_t reserved_bytes;
  uint64_t runtime_bytes;
  uint64_t cached_bytes;
  uint64_t hits;
  uint64_t misses;
} el_allocator_stats;

/* The library. Safe from any thread. */

/// EL_ABI_VERSION of the library that was loaded; compare it with the header's.
EL_API int32_t el_abi_version(void);
/// The message of this thread's last failure; "" if there was none. Valid until the next.
EL_API const char* el_last_error(void);
/// What the kernels may use here ("x86_64 avx2 avx512f"). Lives for ever.
EL_API const char* el_cpu_features(void);

/* ONNX Runtime's allocator. The library also exports RegisterCustomOps, which the engine calls for
   SessionOptions.register_custom_ops_library(path of this library). Safe from any thread. */

/// "registered", "not registered" or why the engine refused. Valid until this thread's next call.
EL_API const char* el_allocator_status(void);
EL_API el_allocator_stats el_get_allocator_stats(void);
/// Writes up to `capacity` live blocks, by address; returns how many there are.
EL_API size_t el_live_blocks(el_block* blocks, size_t capacity);

/* Adapter files. Immutable once open. */

/// Opens, validates and decodes a file. Close with el_adapter_close.
EL_API el_status el_adapter_open(const char* path, el_adapter** adapter);
/// The same adapter cut to the first `rank` rows of every low-rank form, with the scale that the
/// form has there; shares the bytes. EL_UNSUPPORTED, with the known ranks, if it does not work at
/// that rank. Its header is that of the whole. Close with el_adapter_close, in any order.
EL_API el_status el_adapter_at_rank(const el_adapter* adapter, uint32_t rank, el_adapter** out);
EL_API void el_adapter_close(el_adapter* adapter);
/// The edge_lora JSON header. Lives as long as the adapter.
EL_API const char* el_adapter_header(const el_adapter* adapter);
/// Bytes that it keeps in memory.
EL_API uint64_t el_adapter_bytes(const el_adapter* adapter);
EL_API size_t el_adapter_slot_count(const el_adapter* adapter);
/// The i-th slot's name, in the order of names; null if there is none. Lives as long as the
/// adapter.
EL_API const char* el_adapter_slot_name(const el_adapter* adapter, size_t i);
/// Rank and sizes of the low-rank forms of a slot, stacked for an unfused run; rank 0 if the slot
/// has forms of another kind.
EL_API el_status el_adapter_low_rank_shape(const el_adapter* adapter, const char* slot,
                                           uint32_t* rank, uint64_t* in_features,
                                           uint64_t* out_features);
/// Fills a (in, rank) and b (rank, out), with the scales and the adapter's alpha folded into b.
EL_API el_status el_adapter_low_rank(const el_adapter* adapter, const char* slot, float* a,
                                     float* b);

/* Layouts: where element (in k, out n) lies in a block. Immutable. Free with el_layout_free. */

EL_API el_status el_layout_plain(uint64_t in_features, uint64_t out_features, el_stored stored,
                                 el_layout** layout);
/// Fills in * out values, each of which names its own position, for an engine to pack.
EL_API el_status el_layout_probe_values(uint64_t in_features, uint64_t out_features,
                                        el_stored stored, float* values);
/// Reads the layout off the block in which the engine packed them.
EL_API el_status el_layout_from_probe(const float* block, uint64_t bytes, uint64_t in_features,
                                      uint64_t out_features, el_layout** layout);
EL_API el_status el_layout_from_bytes(const void* data, size_t bytes, el_layout** layout);
/// Writes up to `capacity` bytes; `*bytes` becomes how many there are.
EL_API el_status el_layout_to_bytes(const el_layout* layout, void* data, size_t capacity,
                                    size_t* bytes);
EL_API uint64_t el_layout_elements(const el_layout* layout);
EL_API uint64_t el_layout_line(const el_layout* layout);
EL_API void el_layout_free(el_layout* layout);

/* Images: the packed weights of one session. The engine owns the blocks; they must stay where they
   are until el_image_close. */

EL_API el_status el_image_open(int threads, el_image** image);
/// Forgets the blocks and frees the handle. The weights stay as they are: swap to null before.
EL_API void el_image_close(el_image* image);
/// Declares a slot and where its pristine weight lies on disk. The file is kept open.
EL_API el_status el_image_add_slot(el_image* image, const char* name, uint64_t in_features,
                                   uint64_t out_features, const char* file, uint64_t offset,
                                   el_stored stored);
/// Lets adapters call a slot by another name too.
EL_API el_status el_image_add_alias(el_image* image, const char* name, const char* alias);
/// Binds a block to the slot if it holds exactly the slot's pristine weight; `*bound` becomes 1, or
/// 0 if it holds something else.
EL_API el_status el_image_add_place(el_image* image, const char* name, const el_layout* layout,
                                    float* block, uint64_t bytes, int32_t* bound);
/// Compiles base + sum of weights[i] * adapters[i]. The adapters may be closed afterwards.
EL_API el_status el_image_compile(el_image* image, const el_adapter* const* adapters,
                                  const double* weights, size_t count, el_patch** patch);
EL_API el_status el_image_load_patch(el_image* image, const char* path, el_patch** patch);
/// Takes the active patch out and puts `patch` in (null: the base), as one step. On a failure the
/// image is as it was, or damaged. `stats` may be null.
EL_API el_status el_image_swap(el_image* image, el_patch* patch, el_swap_stats* stats);
/// `*damaged` becomes 1 if a swap failed and could not be undone, else 0. The weights of a damaged
/// image are a mixture: every later call fails, and the session must not be run any more.
EL_API el_status el_image_damaged(el_image* image, int32_t* damaged);
/// Exchanges one value at a flat (out, in) index in all places; for self-tests. `old` may be null.
EL_API el_status el_image_poke(el_image* image, const char* name, uint64_t index, float value,
                               float* old);
/// `*count` becomes how many slots' bytes are not the pristine weight's (0: the base, to the bit).
EL_API el_status el_image_differing_slots(el_image* image, size_t* count);
/// Writes 64 hex digits and a zero: the sha256 of all places' bytes in the order of slots.
EL_API el_status el_image_sha256(el_image* image, char hex[65]);
/// Fills (out, in) with the weight now in use.
EL_API el_status el_image_merged(el_image* image, const char* name, float* weight);

/* Patches. Free with el_patch_free; an image keeps the one that is in. */

EL_API uint64_t el_patch_bytes(const el_patch* patch);
/// Values whose bits differ from the base; low-rank and row-scale parts count all values of the
/// slot.
EL_API uint64_t el_patch_changed(const el_patch* patch);
EL_API size_t el_patch_slot_count(const el_patch* patch);
/// Null if there is none. Lives as long as the patch.
EL_API const char* el_patch_slot_name(const el_patch* patch, size_t i);
/// Writes a cache file, atomically. Refused while the patch is in.
EL_API el_status el_patch_save(el_patch* patch, const char* path);
EL_API void el_patch_free(el_patch* patch);

#ifdef __cplusplus
}  // extern "C"
#endif
