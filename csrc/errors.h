// Errors that Python raises as ValueError or TypeError. torch's stable ABI passes on the text of a std::exception and no
// type: so the text begins with the type, and infopo_kernels/backends/cpp.py raises it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace infopo {

template <typename... Parts>
[[noreturn]] void fail(const char* type, const Parts&... parts) {
  std::ostringstream text;
  text << type << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  fail("ValueError", parts...);
}

template <typename... Parts>
[[noreturn]] void type_error(const Parts&... parts) {
  fail("TypeError", parts...);
}

}  // namespace infopo
