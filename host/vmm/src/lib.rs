//! One VM's process: assembly, lifecycle, vCPU loop, HTTP interface, isolation.
