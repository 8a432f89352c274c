// The Python module `vitrail.kernels._C`. Importing it loads this library, whose static initialisers register the ops
// as torch.ops.vitrail_C; the module itself is empty.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.vitrail_C.", -1};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
