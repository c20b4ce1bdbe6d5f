"""Is everything there that a run needs, on every node, before a rank starts?"""
