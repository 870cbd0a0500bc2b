"""Where records come from: LMDBs of Datum messages, HDF5 files, and what is done to images on the way to a blob."""
