"""What is the neural tangent kernel of a model, and how much of it is left when few parameters are trained?"""
