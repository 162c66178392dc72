// The shipped kernels as a library for the CPU. BASE, TUNED and COMPARE name formats, as for NVRTC.
#include "cuda_on_host.h"

#include "decode.cu"
#include "harvest.cu"
#include "refine.cu"
#include "scan.cu"
#include "spectra.cu"
#include "ties.cu"

#define LAUNCHER(KERNEL)                                                                                               \
    extern "C" void launch_##KERNEL(unsigned blocks, unsigned threads, unsigned seed, void** arguments) {              \
        on_host::launch(KERNEL, blocks, threads, seed, arguments);                                                     \
    }
LAUNCHER(decode)
LAUNCHER(harvest)
LAUNCHER(refine)
LAUNCHER(scan)
LAUNCHER(place_ties)
LAUNCHER(take_ties)
LAUNCHER(panel_float32)
LAUNCHER(panel_float64)
LAUNCHER(magnitudes_float32)
LAUNCHER(magnitudes_float64)
LAUNCHER(scores_float32)
LAUNCHER(scores_float64)
LAUNCHER(squares_float32)
LAUNCHER(squares_float64)

extern "C" {
void set_flush_to_zero(bool flush) { on_host::flush_to_zero = flush; }
extern const unsigned layout_sizes[] = {sizeof(Tile),    sizeof(Record), sizeof(ScanSettings), sizeof(Search),
                                        sizeof(CodeBox), sizeof(Codes),  sizeof(Bin)};
}
