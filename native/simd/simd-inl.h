// The vectors of the target being compiled: HEADRACE_TARGET names it, the compiler's flags allow it.
#if defined(__AVX512F__)
#include "simd/avx512-inl.h"
#elif defined(__AVX2__)
#include "simd/avx2-inl.h"
#else
#include "simd/portable-inl.h"
#endif
