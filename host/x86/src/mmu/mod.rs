//! Memory as the processor sees it.

mod code_map;

pub use code_map::CodeMap;
