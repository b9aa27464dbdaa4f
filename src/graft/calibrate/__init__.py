"""Solvers that choose the codes; imports graft.data, graft.plan and below, no sibling."""
