"""Runtimes: what compiles and runs a graph."""
