// Marks unused memory for the address sanitizer. Without the sanitizer, the macros are empty.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#ifndef ASAN_POISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(p, n) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) static_cast<void>(0)
#endif
