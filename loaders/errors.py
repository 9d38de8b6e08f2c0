"""What loaders and converters raise about data: one paragraph that ends with the next step to take."""


class DataError(Exception):
    """The data cannot be used as it is; the message says what to do."""
