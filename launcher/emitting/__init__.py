"""What does a batch system need to run a config, instead of it being started here?"""
