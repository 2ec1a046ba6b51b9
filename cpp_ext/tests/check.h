// The whole test framework: a fact that does not hold ends the program and says where.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#define CHECK(fact)                                                                  \
  do {                                                                               \
    if (!(fact)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #fact); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

/// The message of the exception that `work` throws; "" if it throws none.
template <typename Work>
std::string MessageOf(const Work& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}
