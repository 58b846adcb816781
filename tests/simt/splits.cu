/* csrc/cuda/splits.cuh for tests/test_splits_simt.py. sums: tiles, steps, step, part. who: a PkAdds.
 * out: parts, apart, clocks. */
#include "cuda/splits.cuh"

extern "C" PK_EXPORT void pk_test_splits(const int64_t *sums, int who, int64_t *out) {
    const PkSums s = {sums[0], sums[1], sums[2], sums[3]};
    const PkSplit split = pk_splits(s, static_cast<PkAdds>(who));
    out[0] = split.parts, out[1] = split.apart;
    out[2] = pk_split_clocks(s, split, pk_device_attribute(cudaDevAttrMultiProcessorCount, 0));
}
extern "C" PK_EXPORT int64_t pk_test_step_clocks(int64_t BM, int64_t BN, int64_t BK) {
    return pk_step_clocks(BM, BN, BK, pk_small_gpu());
}
