//! Tests of configuration space, MSI-X and routing together.
