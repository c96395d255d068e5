"""What a Dask cluster needs on this side: a client, an exchange of batches, an eye on both. Dask's only door."""
