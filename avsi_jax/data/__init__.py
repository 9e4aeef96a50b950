"""From a dataset's TFRecords to model inputs: reading, features, augmentation, statistics, text."""
