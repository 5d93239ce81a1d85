"""Facts as data: archives, counts, classes and the JSON schema of a manifest. Read through imnet_prep.catalog."""
