"""Where images come from when they are converted: folder trees and tars, the latter read in place.

A labelled image is found by its folder: the folder that holds it is its class, the folder above may be its split.

    train/n01440764/n01440764_10026.JPEG         in a folder or a tar, leading folders are fine
    n01440764/n01440764_10026.JPEG               the split is then named by --split, or by the folder's own name
    ILSVRC2012_img_train.tar                     a tar of one tar a class
    ILSVRC2012_img_val.tar                       flat; labels come from the devkit
    imagenet-r/n01443537/art_0.jpg               ImageNet-R, -A and -Sketch: a folder a wnid
    …-format-val/12/1e2f….jpeg                   ImageNet-V2: a folder a class NUMBER (or a wnid)
    objectnet-1.0/images/alarm_clock/….png       ObjectNet: names of its own, which objectnet-1.0/mappings/ explains
"""
