// Our exceptions as Python's; for every extension module of this project.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>
#include <exception>
#include <new>

#include "status.h"

namespace edge_lora {

/// For nanobind::register_exception_translator.
/// edge_lora.native knows which Python exception a status code is.
inline void Translate(const std::exception_ptr& failure, void* /*unused*/) {
  namespace nb = nanobind;
  const auto raise = [](Code code, const char* text) {
    // A path need not be UTF-8.
    const auto size = static_cast<Py_ssize_t>(std::strlen(text));
    const nb::object message = nb::steal(PyUnicode_DecodeUTF8(text, size, "replace"));
    const nb::object error =
        nb::module_::import_("edge_lora.native").attr("error_for")(message, static_cast<int>(code));
    PyErr_SetObject(error.type().ptr(), error.ptr());
  };
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    raise(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    raise(Code::kOutOfMemory, "out of memory");
  }
}

}  // namespace edge_lora
