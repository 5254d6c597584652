"""Values of tensors as numbers. The only package outside ``statedict.torch`` with numpy and ml_dtypes."""
