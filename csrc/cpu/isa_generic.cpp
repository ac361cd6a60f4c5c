// The kernels for every other processor: the compiler's baseline, 16-byte vectors (SSE2, NEON).
#include "isa_headers.h"

#define COVER_ISA generic
#define COVER_ISA_NAME "generic"
#define COVER_BYTES 16
#define COVER_REGISTERS 32
#include "isa.h"
