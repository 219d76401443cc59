//! What every HTTP adapter of the platform needs and none should write again.
