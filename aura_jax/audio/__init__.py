"""From a file or bytes to the log-mel frames that the models read: io, features, augment."""
