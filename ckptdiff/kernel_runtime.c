/* What compiled kernels ask of Numba's runtime: memory that counts its users, and the like. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define INSIDE __attribute__((visibility("hidden")))

/* As Numba lays it out; compiled code reads and writes users and data. */
struct memory {
    size_t users;
    void *end, *end_argument, *data;
    size_t size;
    void *allocator;
};

INSIDE struct memory *NRT_MemInfo_alloc_aligned(size_t size, uint32_t align)
{
    struct memory *found = malloc(sizeof *found + size + align);
    if (!found)
        return NULL;
    uintptr_t data = (uintptr_t)(found + 1) + align - 1;
    *found = (struct memory){1, NULL, NULL, (void *)(data - data % align), size, NULL};
    return found;
}

INSIDE struct memory *NRT_MemInfo_alloc(size_t size)
{
    return NRT_MemInfo_alloc_aligned(size, 1);
}

INSIDE void NRT_MemInfo_call_dtor(struct memory *unused)
{
    free(unused);
}

INSIDE void *NRT_Allocate(size_t size)
{
    return malloc(size);
}

INSIDE void NRT_Free(void *unused)
{
    free(unused);
}

/* Returns 0, upon which a kernel fails, for an array that is not contiguous: no kernel reshapes one. */
INSIDE int numba_attempt_nocopy_reshape(int64_t count, const int64_t *sizes, const int64_t *strides, int64_t new_count,
                                        const int64_t *new_sizes, int64_t *new_strides, int64_t itemsize, int fortran)
{
    int64_t step = itemsize;
    for (int64_t i = count; i-- > 0; step *= sizes[i])
        if (fortran || (sizes[i] != 1 && strides[i] != step))
            return 0;
    step = itemsize;
    for (int64_t i = new_count; i-- > 0; step *= new_sizes[i])
        new_strides[i] = step;
    return 1;
}

INSIDE double numba_ldexp(double value, int exponent)
{
    return ldexp(value, exponent);
}

/* What Numba's own wrappers would make an exception of Python's with; a failed kernel only says that it failed. */
#define NEVER(name)                                                 \
    INSIDE void name(void)                                          \
    {                                                               \
        fputs("ckptdiff: a compiled kernel called " #name "\n", stderr); \
        abort();                                                    \
    }

NEVER(PyErr_SetString)
NEVER(PyObject_Hash)
NEVER(PyTuple_Pack)
NEVER(PyUnicode_FromKindAndData)

INSIDE void *PyExc_RuntimeError = NULL;
