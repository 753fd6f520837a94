"""What moving costs and what to move: fabric profiles, the cost model and the predicate."""
