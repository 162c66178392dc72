// Every kernel in one unit, for nvcc and NVRTC.
#include "decode.cu"
#include "harvest.cu"
#include "refine.cu"
#include "scan.cu"
#include "spectra.cu"
#include "ties.cu"
