"""From TFRecords to model inputs: reading records, features, augmentation, train statistics and Grid text."""
