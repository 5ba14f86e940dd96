"""What is wrong with what somebody gave to training: every such error says what to do, and a command ends with it."""


class TrainingError(Exception):
    """Base of the errors that a user of the commands can mend; everything else is a fault of the code."""
