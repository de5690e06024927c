// Run-time choice of the vector instructions: a function marked BBFAST_CLONES is compiled once for each level, and the
// loader picks the best one the processor has. One binary runs everywhere and is still fast.
#pragma once

// The highest level to build; lower ones are for trying on a new processor what an old one would do.
#ifndef BBFAST_SIMD_LEVEL
#define BBFAST_SIMD_LEVEL 4
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && BBFAST_SIMD_LEVEL >= 3
#define BBFAST_HAS_CLONES 1
#if BBFAST_SIMD_LEVEL >= 4
#define BBFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BBFAST_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
#else
#define BBFAST_HAS_CLONES 0
#define BBFAST_CLONES
#endif

// Code shared by the levels must be compiled into each of them.
#define BBFAST_INLINE inline __attribute__((always_inline))

namespace bbfast {

// Whether multiply-add is one instruction on this processor, so that a loop with __builtin_fmaf is fast.
inline bool has_fused_multiply_add() {
#if BBFAST_HAS_CLONES
  return __builtin_cpu_supports("x86-64-v3");
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return true;
#else
  return false;
#endif
}

}  // namespace bbfast
