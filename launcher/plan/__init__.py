"""What does `sparse-zero plan` answer, from a config and shapes alone?"""
