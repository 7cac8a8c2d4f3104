//! Stands between source and destination and does harm at one frame of their conversation.
