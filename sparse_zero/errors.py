"""What does the package raise when the user's input, not the program, is wrong?"""


class InputError(ValueError):
    """Input that cannot be used as given.

    The message names the field, the value and the remedy in one line. It is raised before anything is
    allocated, downloaded or written. The command line prints it without a traceback and exits with 2.
    """

    # Set where several ranks checked their own input and this one is to report for all of them.
    speaks_for_all = False
