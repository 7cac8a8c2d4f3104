//! Loads a kernel into guest memory: ELF by PVH; a bzImage is unpacked on the host first.
