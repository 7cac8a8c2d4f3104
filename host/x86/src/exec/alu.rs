//! Integer arithmetic and logic with two operands, and the moves.
