"""How does `sparse-zero launch` start, watch and end the ranks of a run?"""
