// The text of a broken invariant, for the check of each part.
#pragma once

#include <cstdint>
#include <string>

namespace kvindex {

inline std::string broken(const char* what, std::uint64_t a, std::uint64_t b) {
    return std::string(what) + " (" + std::to_string(a) + ", " + std::to_string(b) + ")";
}

}  // namespace kvindex
