"""The backend of NVIDIA GPUs: generated Triton kernels, cuDNN, cuBLAS, and the references on the device."""
