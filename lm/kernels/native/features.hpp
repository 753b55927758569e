// Which instructions beyond its oldest kind this processor has, and the system lets a program use.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace inkling {

#if defined(__x86_64__)

inline bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // F16C
}

inline bool has_avx512_bf16() {
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vnni"))
        return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);  // AVX512_BF16
}

// Linux gives a process the tiles only if it asks for them; all its threads then have them.
inline bool has_amx_bf16() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, -TILE
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

#elif defined(__aarch64__) && defined(__linux__)

// The bits are those of Linux's asm/hwcap.h, which older systems do not name.
inline bool has_neon_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }                      // ASIMDDP
inline bool has_neon_bf16() { return has_neon_dotprod() && getauxval(AT_HWCAP2) >> 14 & 1; }  // BF16

#elif defined(__aarch64__) && defined(__APPLE__)

inline bool has_feature(const char* name) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(name, &found, &size, nullptr, 0) == 0 && found;
}
inline bool has_neon_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
inline bool has_neon_bf16() { return has_neon_dotprod() && has_feature("hw.optional.arm.FEAT_BF16"); }

#elif defined(__aarch64__)

inline bool has_neon_dotprod() { return false; }
inline bool has_neon_bf16() { return false; }

#endif

}  // namespace inkling
