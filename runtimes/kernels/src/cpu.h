// Which instruction sets this processor has and this operating system saves. Each architecture defines its own.
#ifndef QSK_SRC_CPU_H_
#define QSK_SRC_CPU_H_

namespace qsk {

bool cpu_has_anything();    // always true: the portable kernels
bool cpu_has_avx2();        // AVX2, F16C, FMA and POPCNT, with YMM state
bool cpu_has_avxvnni();     // AVX-VNNI on top of it
bool cpu_has_avx512vnni();  // AVX-512 F, BW, VL, VNNI on top of AVX2, with ZMM and mask state
bool cpu_has_neon();
bool cpu_has_neondot();   // the dot product on top of it
bool cpu_has_neoni8mm();  // int8 matrix products on top of that

}  // namespace qsk

#endif  // QSK_SRC_CPU_H_
