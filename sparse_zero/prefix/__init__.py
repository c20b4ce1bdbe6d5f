"""Which part of the model gives the same in every epoch, and where is what it gave kept?"""
